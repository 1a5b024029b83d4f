"""How constraints are attached to modules, and taken off again."""
