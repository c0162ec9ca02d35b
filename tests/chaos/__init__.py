"""How faults are caused on real servers, and how a trial of one under load is judged."""
