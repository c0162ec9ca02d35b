"""What stands in for the clock, etcd, RabbitMQ and the threads in tests: in memory, no threads."""
