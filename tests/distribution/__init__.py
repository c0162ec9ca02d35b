"""The library's wheel and sdist, as an index and a user get them."""
