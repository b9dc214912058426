"""What producers send, and how. strategies.py has what hypothesis draws."""
