"""The consumers that are measured beside the order service, each run as a process of its own."""
