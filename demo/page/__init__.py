"""`make play`: a page on which one breaks the system and watches events survive."""
