"""The documents are held against the code, and their links against what is there."""
