"""Reading a cache: mapped or streamed, in an order that can be resumed."""
