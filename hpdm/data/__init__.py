"""Clips out of folders and tar shards, decoded in processes of their own, in an order that resumes; a synthetic set."""
