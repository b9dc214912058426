"""What `make run` needs: servers of our own, everything started together, an economy to look at.

up.py      servers, worker, API and Flower as one thing
embedded/  PostgreSQL and Valkey from wheels
demo/      a small token economy
"""
