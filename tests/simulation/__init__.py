"""The service's own run against a RabbitMQ and an etcd in memory on a bad day, from a seed.

One seed replays one run: ``python -m simulation --seed 7`` shows it step by step.
"""
