//! What a layer was called with, as Keras 3 and Keras 2 write it, and the arithmetic that is written without layers.

use serde_json::Value;

use crate::model::layers::list::{Kind, Numbers};

const NOT_UNDERSTOOD: &str = "a call that is not understood";
/// Stands where an operation of Keras 2 has a number before its tensor.
const CONSTANT: &str = "_CONSTANT_VALUE";

/// What a call gives: the layer's name, the number of the call, the number of the output.
pub(super) type Key = (String, u64, u64);

/// An argument of a call.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Arg<T> {
    Tensor(T),
    Number(f64),
}

/// The arguments of a call, tensors first to last.
pub(super) fn args(call: &Value) -> Result<Vec<Arg<Key>>, String> {
    let mut found = Vec::new();
    if let Some(args) = call["args"].as_array() {
        for arg in args {
            collect(arg, &mut found)?;
        }
        let mut named = Vec::new();
        for value in call["kwargs"].as_object().into_iter().flat_map(|kwargs| kwargs.values()) {
            collect(value, &mut named)?;
        }
        check_named(named.iter().any(|arg| matches!(arg, Arg::Tensor(_))))?;
        return Ok(found);
    }
    // Keras 2: a list of [layer, call, output, arguments]; of an operation one of them alone, with the rest by name.
    let tensors = call.as_array().ok_or(NOT_UNDERSTOOD)?;
    if tensors.first().is_some_and(Value::is_string) {
        return operands(call);
    }
    for tensor in tensors {
        found.push(Arg::Tensor(key(tensor).ok_or(NOT_UNDERSTOOD)?));
        check_named(named_of(tensor).any(|(_, value)| key(value).is_some()))?;
    }
    Ok(found)
}

/// Of an operation of TensorFlow in a model of Keras 2: `[layer, call, output, {"y": 0.5}]`.
fn operands(call: &Value) -> Result<Vec<Arg<Key>>, String> {
    let operand = |value: &Value| match value {
        Value::Number(number) => number.as_f64().map(Arg::Number),
        other => key(other).map(Arg::Tensor),
    };
    let first = match call[0].as_str() {
        Some(CONSTANT) => operand(&call[2]),
        _ => operand(call),
    };
    let mut found = vec![first.ok_or(NOT_UNDERSTOOD)?];
    for (name, value) in named_of(call).filter(|(name, value)| *name != "name" && !value.is_null()) {
        let value = operand(value).filter(|_| name == "y");
        found.push(value.ok_or_else(|| format!("the argument `{name}` is not computed"))?);
    }
    Ok(found)
}

/// What stands behind a tensor's layer, call and output.
fn named_of(tensor: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let named = tensor[3].as_object().into_iter().flatten();
    named.map(|(name, value)| (name.as_str(), value))
}

fn check_named(has_tensor: bool) -> Result<(), String> {
    match has_tensor {
        true => Err("a tensor by keyword (a mask or a state) is not computed".to_string()),
        false => Ok(()),
    }
}

fn collect(value: &Value, found: &mut Vec<Arg<Key>>) -> Result<(), String> {
    match value {
        Value::Array(list) => list.iter().try_for_each(|value| collect(value, found)),
        Value::Number(number) => {
            found.extend(number.as_f64().map(Arg::Number));
            Ok(())
        }
        Value::Object(object) if object.get("class_name").is_some_and(|class| class == "__keras_tensor__") => {
            let history = object.get("config").and_then(|config| key(&config["keras_history"]));
            found.push(Arg::Tensor(history.ok_or("a tensor without a history")?));
            Ok(())
        }
        Value::Object(_) => Err("an argument that is not understood".to_string()),
        Value::Null | Value::Bool(_) | Value::String(_) => Ok(()),
    }
}

/// `[layer, call, output]`.
fn key(value: &Value) -> Option<Key> {
    let parts = value.as_array()?;
    Some((parts.first()?.as_str()?.to_string(), parts.get(1)?.as_u64()?, parts.get(2)?.as_u64()?))
}

/// One key, a list of them, or an object of them.
pub(super) fn keys(value: &Value) -> Option<Vec<Key>> {
    match value {
        Value::Array(list) if list.first().is_some_and(Value::is_string) => Some(vec![key(value)?]),
        Value::Array(list) => list.iter().map(key).collect(),
        Value::Object(object) => object.values().map(key).collect(),
        _ => None,
    }
}

/// A sum, difference, product or quotient, of tensors or of a tensor and a number.
pub(super) fn arithmetic<T>(class: &str, args: &[Arg<T>]) -> Result<Kind, String> {
    let rescale = |scale: f64, offset: f64| Kind::Rescale { scale: Numbers::One(scale), offset: Numbers::One(offset) };
    Ok(match (class, args) {
        ("Add", [Arg::Tensor(_), Arg::Number(n)] | [Arg::Number(n), Arg::Tensor(_)]) => rescale(1.0, *n),
        ("Multiply", [Arg::Tensor(_), Arg::Number(n)] | [Arg::Number(n), Arg::Tensor(_)]) => rescale(*n, 0.0),
        ("Subtract", [Arg::Tensor(_), Arg::Number(n)]) => rescale(1.0, -n),
        ("Subtract", [Arg::Number(n), Arg::Tensor(_)]) => rescale(-1.0, *n),
        ("Divide" | "TrueDivide", [Arg::Tensor(_), Arg::Number(n)]) => rescale(1.0 / n, 0.0),
        (_, args) if args.iter().any(|arg| matches!(arg, Arg::Number(_))) => {
            return Err("this order of tensors and numbers is not computed".to_string());
        }
        ("Add", _) => Kind::Add,
        ("Subtract", _) => Kind::Subtract,
        ("Multiply", _) => Kind::Multiply,
        _ => Kind::Divide,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tensor(name: &str, call: u64) -> Arg<Key> {
        Arg::Tensor((name.to_string(), call, 0))
    }

    #[test]
    fn operations_of_keras_2_have_their_operands_in_order() {
        // From a file that tf_keras 2.21.0 wrote.
        let call = json!(["inner", 1, 0, {"y": ["tf.math.multiply", 0, 0], "name": null}]);
        assert_eq!(args(&call).unwrap(), [tensor("inner", 1), tensor("tf.math.multiply", 0)]);
        let call = json!(["inner", 2, 0, {"y": 0.5, "name": null}]);
        assert_eq!(args(&call).unwrap(), [tensor("inner", 2), Arg::Number(0.5)]);
        let call = json!(["_CONSTANT_VALUE", -1, 1.0, {"y": ["x", 0, 0], "name": null}]);
        assert_eq!(args(&call).unwrap(), [Arg::Number(1.0), tensor("x", 0)]);
        let call = json!(["x", 0, 0, {"axis": -1}]);
        assert_eq!(args(&call).unwrap_err(), "the argument `axis` is not computed");
    }

    #[test]
    fn a_state_by_keyword_is_no_argument_to_leave_out() {
        let plain = json!([["x", 0, 0, {"training": false, "mask": null}], ["y", 0, 0, {}]]);
        assert_eq!(args(&plain).unwrap(), [tensor("x", 0), tensor("y", 0)]);
        let masked = json!([["x", 0, 0, {"mask": ["m", 0, 0]}]]);
        assert!(args(&masked).unwrap_err().contains("by keyword"));
        for not_understood in [json!(7), json!([7]), json!([["x", 0]]), json!(["x", 0])] {
            assert_eq!(args(&not_understood).unwrap_err(), NOT_UNDERSTOOD);
        }
    }
}
