"""Other projects' own test-suites, run against kl-plugins: nothing of them is kept here."""
