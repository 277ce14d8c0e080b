"""The pass: marked and frozen nodes become lookups."""
