"""How hypothesis looks for what breaks a unit test."""

import os

import hypothesis

# No deadline for one example: a busy machine is no failure. No database: a test leaves nothing in the checkout.
hypothesis.settings.register_profile(
    "unit", deadline=None, database=None, max_examples=int(os.environ.get("FUZZ_INPUTS", "100"))
)
hypothesis.settings.load_profile("unit")
