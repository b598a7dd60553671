"""Parts of a plan that several machines have sent: what each leaves, and how they are joined."""
