//! Results that are found instead of computed: in this process, in Redis, and in the hands of another request.

mod common;

#[path = "cache/inferences.rs"]
mod inferences;
#[path = "cache/protocols.rs"]
mod protocols;
#[path = "cache/redis.rs"]
mod redis;
