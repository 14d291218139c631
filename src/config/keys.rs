//! What a key is, and how it is found. Their table is in [`super::table`].

use super::Settings;
use super::values::Field;

pub use super::table::{KEYS, SECTIONS};

/// When a changed value takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// At once, by SIGHUP or by writing the file.
    Live,
    /// At the next start.
    Restart,
    /// Checked now, used by a part that is not in this version.
    Later,
}

/// One key of one section.
pub struct Key {
    pub section: &'static str,
    pub name: &'static str,
    /// Another accepted name.
    pub alias: Option<&'static str>,
    pub effect: Effect,
    /// Where the value lives in [`Settings`]. Takes `&mut` for reading too: one accessor serves both.
    pub field: fn(&mut Settings) -> &mut dyn Field,
    /// What it means: full sentences, for `config show` and `docs/config.md`.
    pub doc: &'static str,
}

impl Key {
    /// `api.listen`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// `EREMOIS_API__LISTEN`.
    pub fn variable(&self) -> String {
        variable(self.section, self.name)
    }

    /// Whether `name` is this key's name or alias.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || self.alias == Some(name)
    }
}

/// The environment variable of a section's key.
pub fn variable(section: &str, name: &str) -> String {
    format!("EREMOIS_{}__{}", section.to_uppercase(), name.to_uppercase())
}

/// Index in [`KEYS`] of a section's key, by name or alias.
pub fn find(section: &str, name: &str) -> Option<usize> {
    KEYS.iter().position(|k| k.section == section && k.is_called(name))
}
