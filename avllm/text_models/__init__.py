"""Text models that rewrite captions and questions: in process or behind a server."""
