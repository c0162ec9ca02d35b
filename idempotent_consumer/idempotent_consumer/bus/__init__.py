"""Deliveries in, acks and forwarded messages out. The only package that knows RabbitMQ and pika."""
