"""The operator's command, ``idempotent-consumer``: a file for each kind of verb."""
