"""What of a clip goes to the encoders, chosen by the question, one selector a file."""
