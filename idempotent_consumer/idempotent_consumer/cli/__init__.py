"""The operator's command, ``idempotent-consumer``: one file for each of its verbs."""
