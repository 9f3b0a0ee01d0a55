"""Text models that rewrite captions and questions: in process or on a server."""
