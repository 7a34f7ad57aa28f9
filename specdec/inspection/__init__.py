"""What happened in a call: traces, and the explanation of what is used and why."""
