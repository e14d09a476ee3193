//! Real servers, unmodified: each gets exactly its share.
