"""Runs of the real consumer, ledger and bus against models of RabbitMQ and etcd, from a seed.

One seed replays one run: ``python -m simulation --seed 7`` shows it step by step.
"""
