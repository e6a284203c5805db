"""The blind user study: its design fixed before the first answer, and its statistics."""
