"""What people see of the running stack, in a real browser: `make browser-test`."""
