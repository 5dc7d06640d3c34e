"""Speed, always against a ceiling measured in the same run."""
