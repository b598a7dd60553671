"""A plan that decides: rounds of measuring where the decision hangs, until it is made or the time is over."""
