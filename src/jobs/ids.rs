//! Ids of files and batches: a prefix and a UUID of version 7, so that they rise with the time they were made at.

use jiff::Timestamp;
use uuid::Uuid;

/// What ids of files begin with.
pub const FILE: &str = "file-";
/// What ids of batches begin with.
pub const BATCH: &str = "batch_";

/// A new id.
pub fn new(prefix: &str) -> String {
    format!("{prefix}{}", Uuid::now_v7().simple())
}

/// The id of what is made for `seed` at this time: the same whoever makes it, and however often.
pub fn derived(prefix: &str, at: Timestamp, seed: &str) -> String {
    format!("{prefix}{}", derived_uuid(at, seed).simple())
}

/// A UUID of version 7 with this time, and bits of BLAKE3 of the seed where others have random ones.
pub fn derived_uuid(at: Timestamp, seed: &str) -> Uuid {
    let hash = blake3::hash(seed.as_bytes());
    let mut bits = [0; 10];
    bits.copy_from_slice(&hash.as_bytes()[..10]);
    uuid::Builder::from_unix_timestamp_millis(millis(at), &bits).into_uuid()
}

/// When an id was made; `None` for a text that is none of this prefix.
pub fn created_at(prefix: &str, id: &str) -> Option<Timestamp> {
    let hex = id.strip_prefix(prefix).filter(|hex| hex.len() == 32)?;
    let (seconds, nanos) = Uuid::try_parse(hex).ok()?.get_timestamp()?.to_unix();
    Timestamp::new(i64::try_from(seconds).ok()?, i32::try_from(nanos).ok()?).ok()
}

fn millis(at: Timestamp) -> u64 {
    u64::try_from(at.as_millisecond()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::now;

    #[test]
    fn derived_ids_are_the_same_each_time_and_carry_their_time() {
        let at = now();
        let id = derived(FILE, at, "batch_1 output");
        assert_eq!(id, derived(FILE, at, "batch_1 output"));
        assert_ne!(id, derived(FILE, at, "batch_1 errors"));
        assert_eq!(created_at(FILE, &id), Some(at));
        assert!(new(FILE).starts_with(FILE) && created_at(FILE, &new(FILE)).is_some());
        assert!(derived(FILE, at, "x") < derived(FILE, crate::jobs::after(std::time::Duration::from_millis(2)), "x"));
        for bad in
            ["", "file-", "file-12", "batch_019a7b2c3d4e7f80912a3b4c5d6e7f80", "file-zz9a7b2c3d4e7f80912a3b4c5d6e7f80"]
        {
            assert_eq!(created_at(FILE, bad), None, "{bad}");
        }
    }
}
