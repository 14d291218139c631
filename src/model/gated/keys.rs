//! Reading `config.json` by key, with several names for one thing and with refusals by name.

use std::path::Path;

use serde_json::Value;

use super::super::weights::file_error;
use super::config::{Rope, RopeScaling};
use crate::Result;

/// A `config.json`. A key whose value is null counts as absent, as it does for transformers.
pub(super) struct Keys<'a> {
    pub path: &'a Path,
    pub value: &'a Value,
}

impl<'a> Keys<'a> {
    /// The first of these names that is there.
    fn first(&self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names.iter().find_map(|name| self.value.get(name).filter(|v| !v.is_null()).map(|v| (*name, v)))
    }

    fn read<T>(
        &self,
        names: &[&'static str],
        kind: &str,
        as_kind: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some((name, value)) = self.first(names) else { return Ok(None) };
        let wrong = || file_error(self.path, format!("`{name}` must be {kind}, got {value}"));
        as_kind(value).map(Some).ok_or_else(wrong)
    }

    /// A count; 0 is refused.
    pub fn number(&self, names: &[&'static str]) -> Result<Option<usize>> {
        self.read(names, "a whole number from 1", |v| {
            v.as_u64().filter(|n| *n > 0).and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A count that must be there.
    pub fn need(&self, names: &[&'static str]) -> Result<usize> {
        let missing = || file_error(self.path, format!("`{}` is missing", names.join("` or `")));
        self.number(names)?.ok_or_else(missing)
    }

    pub fn real(&self, names: &[&'static str]) -> Result<Option<f64>> {
        self.read(names, "a number above 0", |v| v.as_f64().filter(|x| *x > 0.0 && x.is_finite()))
    }

    pub fn flag(&self, name: &'static str, default: bool) -> Result<bool> {
        Ok(self.read(&[name], "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub fn text(&self, names: &[&'static str]) -> Result<Option<&'a str>> {
        self.read(names, "a text", Value::as_str)
    }

    /// Refuses a key that changes what is computed, unless it is absent or has one of these values.
    pub fn only(&self, name: &'static str, supported: &[Value]) -> Result<()> {
        match self.value.get(name) {
            Some(value) if !value.is_null() && !supported.iter().any(|known| same(known, value)) => {
                let supported: Vec<String> = supported.iter().map(Value::to_string).collect();
                let list = if supported.is_empty() { "null".to_string() } else { supported.join(", ") };
                Err(file_error(self.path, format!("`{name}` {value} is not supported; supported: {list}")))
            }
            _ => Ok(()),
        }
    }

    /// Which layers look at a window only: `layer_types`, else as `otherwise` says of each.
    pub fn sliding(&self, num_layers: usize, otherwise: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        let Some((_, types)) = self.first(&["layer_types"]) else {
            return Ok((0..num_layers).map(otherwise).collect());
        };
        let wrong = || {
            let known = "`full_attention` or `sliding_attention`";
            file_error(self.path, format!("`layer_types` must be {num_layers} times {known}, got {types}"))
        };
        let kinds = types.as_array().filter(|kinds| kinds.len() == num_layers).ok_or_else(wrong)?;
        let sliding = kinds.iter().map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(wrong()),
        });
        sliding.collect()
    }

    /// Rotary positions: `rope_parameters` as transformers writes them since its release 5, of one kind of layer where
    /// they differ, or `theta_keys`; `rope_scaling` goes before the first as it does for transformers. `has_ntk`:
    /// whether the family has GTE's NTK.
    pub fn rope(
        &self,
        layer_type: Option<&str>,
        theta_keys: &[&'static str],
        default_theta: f64,
        has_ntk: bool,
    ) -> Result<Rope> {
        let all = self.value.get("rope_parameters").filter(|v| !v.is_null());
        let parameters =
            all.and_then(|all| layer_type.and_then(|kind| all.get(kind)).filter(|v| !v.is_null()).or(Some(all)));
        let scaling = self.value.get("rope_scaling").filter(|v| !v.is_null());
        for (name, value) in [("rope_parameters", parameters), ("rope_scaling", scaling)] {
            if let Some(value) = value.filter(|value| !value.is_object()) {
                return Err(file_error(self.path, format!("`{name}` must be an object, got {value}")));
            }
        }
        let find =
            |key: &str| [scaling, parameters].into_iter().flatten().find_map(|v| v.get(key)).filter(|v| !v.is_null());
        let number = |key: &str| -> Result<Option<f64>> {
            let Some(value) = find(key) else { return Ok(None) };
            let wrong =
                || file_error(self.path, format!("`{key}` of rotary positions must be a number above 0, got {value}"));
            value.as_f64().filter(|x| *x > 0.0 && x.is_finite()).map(Some).ok_or_else(wrong)
        };
        if let Some(fraction) = number("partial_rotary_factor")?.filter(|fraction| *fraction != 1.0) {
            return Err(file_error(
                self.path,
                format!("`partial_rotary_factor` {fraction} is not supported; supported: 1"),
            ));
        }
        let theta = match number("rope_theta")? {
            Some(theta) => theta,
            None => self.real(theta_keys)?.unwrap_or(default_theta),
        };
        let kind = find("rope_type").or_else(|| find("type")).map_or(Some("default"), Value::as_str);
        let factor =
            || number("factor")?.ok_or_else(|| file_error(self.path, "`factor` of rotary positions is missing"));
        let scaling = match kind {
            Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: factor()? },
            Some("ntk") if has_ntk => RopeScaling::Ntk { factor: factor()? },
            other => {
                let known = if has_ntk { "default, linear, ntk" } else { "default, linear" };
                let kind = other.unwrap_or("no text");
                return Err(file_error(
                    self.path,
                    format!("`rope_type` `{kind}` is not supported; supported: {known}"),
                ));
            }
        };
        // GTE's own scheme with another one mixed in.
        if let Some(mixed) = find("mixed_b") {
            return Err(file_error(self.path, format!("`mixed_b` {mixed} is not supported; supported: null")));
        }
        Ok(Rope { theta, scaling })
    }
}

/// Whether two values are equal, numbers by their value: 1 and 1.0 are.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
