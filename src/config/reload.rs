//! What differs between two readings of the settings.

use super::Settings;
use super::keys::{Effect, KEYS, Key};

/// One key whose value differs.
pub struct Change {
    pub key: &'static Key,
    /// As TOML, passwords masked.
    pub old: String,
    pub new: String,
}

impl Change {
    /// Whether it takes effect without a restart.
    pub fn is_live(&self) -> bool {
        self.key.effect == Effect::Live
    }
}

/// All keys whose values differ, in the order of the table.
pub fn changes(old: &Settings, new: &Settings) -> Vec<Change> {
    let (mut old, mut new) = (old.clone(), new.clone());
    let all = KEYS.iter().map(|key| Change {
        key,
        old: (key.field)(&mut old).to_toml(),
        new: (key.field)(&mut new).to_toml(),
    });
    all.filter(|change| change.old != change.new).collect()
}
