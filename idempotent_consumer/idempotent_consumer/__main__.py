"""``python -m idempotent_consumer``: the operator's command."""

from .cli.command import main

raise SystemExit(main())
