"""Messages as rows: content as text, text as token ids, turns as parts."""
