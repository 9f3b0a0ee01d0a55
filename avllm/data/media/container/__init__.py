"""Know what is in a container: its tracks, its lengths, and whether its clock rises."""
