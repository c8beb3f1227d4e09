"""`python -m austeer`, and so `accelerate launch -m austeer rank ...`."""

from austeer.commands import run

run()
