"""The demo: five acts on real servers, each of them checked.

`python -m demo` plays them. A `Stage` is what they are played on: the compose stack where Docker
answers, else child processes.
"""
