"""Faults on real servers: the services are killed, frozen, cut off and fed rubbish under load."""
