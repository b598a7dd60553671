"""What serving costs: tokens by key and month, joules, and money."""
