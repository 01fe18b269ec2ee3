"""HTML pages that need no other file: their parts, and plots by matplotlib."""
