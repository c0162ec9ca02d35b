"""Write a new service: a project that is like order, with a handler and a test to begin with."""
