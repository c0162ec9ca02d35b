"""Services on clusters of RabbitMQ and etcd: what they survive there, and how they scale."""
