"""The services as processes, on real servers, through what can happen to them under load or not."""
