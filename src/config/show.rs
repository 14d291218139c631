//! The settings as people read them: commented TOML, and the reference of `docs/config.md`.

use super::keys::{Effect, KEYS, Key, SECTIONS};
use super::{Loaded, Origin, Settings};

/// Commented TOML of every key, with its default, its current value and where that came from. Reads back
/// as the settings it shows, but for masked passwords.
pub fn toml(loaded: &Loaded) -> String {
    let mut settings = loaded.settings.clone();
    let mut defaults = Settings::default();
    let mut out = String::new();
    for (section, about) in SECTIONS {
        out.push_str(&format!("# {about}\n[{section}]\n"));
        for (key, origin) in KEYS.iter().zip(&loaded.origins).filter(|(key, _)| key.section == *section) {
            out.push('\n');
            comment(&mut out, key.doc);
            let form = (key.field)(&mut defaults).form();
            let default = (key.field)(&mut defaults).to_toml();
            comment(&mut out, &format!("Value: {form}. Default: {default}. {}", effect(key)));
            let value = (key.field)(&mut settings).to_toml();
            match origin {
                Origin::Default => out.push_str(&format!("{} = {value}\n", key.name)),
                origin => out.push_str(&format!("{} = {value}  # from {origin}\n", key.name)),
            }
        }
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// The same table as Markdown.
pub fn markdown() -> String {
    let mut defaults = Settings::default();
    let mut out = String::new();
    for (section, about) in SECTIONS {
        out.push_str(&format!("## `[{section}]`\n\n{about}\n\n"));
        for key in KEYS.iter().filter(|key| key.section == *section) {
            let field = (key.field)(&mut defaults);
            let (default, form) = (field.to_toml(), field.form());
            out.push_str(&format!("### `{}`\n\n{}\n\n", key.path(), key.doc));
            out.push_str(&format!("- Value: {form}. Default: `{default}`.\n"));
            out.push_str(&format!("- Environment: `{}`.\n", key.variable()));
            if let Some(alias) = key.alias {
                out.push_str(&format!("- Also accepted as `{section}.{alias}`.\n"));
            }
            out.push_str(&format!("- {}\n\n", effect(key)));
        }
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

fn effect(key: &Key) -> &'static str {
    match key.effect {
        Effect::Live => "Changes while the server runs.",
        Effect::Restart => "A change needs a restart.",
        Effect::Later => "Checked now, used by a later version.",
    }
}

/// Adds `text` as comment lines of at most 100 columns.
fn comment(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > 100 {
            out.push_str(&line);
            out.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    out.push_str(&line);
    out.push('\n');
}
