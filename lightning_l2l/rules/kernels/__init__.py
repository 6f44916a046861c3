"""The arithmetic of the rules, where it has to be fast."""
