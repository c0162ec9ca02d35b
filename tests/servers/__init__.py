"""Real servers, services as processes, and what tests, demo and benchmarks read from them."""
