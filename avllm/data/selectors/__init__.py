"""Choose by the question what of a clip goes to the encoders, one selector a file."""
