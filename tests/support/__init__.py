"""What the tests share: the rows of the table, tolerances with their reasons, oracles, runs side by side."""
