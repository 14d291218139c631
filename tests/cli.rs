//! The command line, as a process.

use std::path::Path;
use std::process::{Command, Output};

struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

/// The binary in a folder of its own, with no setting from this process's surroundings.
fn eremois(dir: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eremois"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("EREMOIS_") || name.starts_with("HF_")) {
        command.env_remove(name);
    }
    let output = command.args(arguments).envs(environment.iter().copied()).current_dir(dir).output();
    let Output { status, stdout, stderr } = output.expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Ended { code: status.code().expect("no signal"), stdout: text(stdout), stderr: text(stderr) }
}

fn empty() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

#[test]
fn version_names_version_commit_and_features() {
    for arguments in [["version"], ["--version"], ["-V"]] {
        let ended = eremois(empty().path(), &arguments, &[]);
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
        let expected = format!("eremois {} (commit ", env!("CARGO_PKG_VERSION"));
        assert!(ended.stdout.starts_with(&expected), "{}", ended.stdout);
        assert!(ended.stdout.trim_end().ends_with(')') && ended.stdout.contains(", features: "), "{}", ended.stdout);
    }
}

#[test]
fn help_tells_every_command() {
    let help = eremois(empty().path(), &["--help"], &[]);
    assert_eq!(help.code, 0);
    for word in [
        "serve",
        "models",
        "jobs",
        "config",
        "migrate",
        "backup",
        "restore",
        "verify",
        "cache",
        "version",
        "--config",
        "--set",
        "eremois config show",
    ] {
        assert!(help.stdout.contains(word), "{word} is missing: {}", help.stdout);
    }
}

#[test]
fn wrong_arguments_exit_2_with_a_hint() {
    let typo = eremois(empty().path(), &["sevre"], &[]);
    assert_eq!(typo.code, 2);
    assert!(typo.stderr.contains("serve"), "{}", typo.stderr);
    assert_eq!(eremois(empty().path(), &["config"], &[]).code, 2);
}

#[test]
fn config_show_tells_where_each_value_comes_from() {
    let dir = empty();
    std::fs::write(dir.path().join("eremois.toml"), "[ai]\nmax_batch_size = 4\n").unwrap();
    let environment = [("EREMOIS_API__LISTEN", "127.0.0.1:9000")];
    let shown = eremois(dir.path(), &["--set", "api.timeout=3s", "config", "show"], &environment);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    for line in [
        "max_batch_size = 4  # from eremois.toml:2",
        "listen = \"127.0.0.1:9000\"  # from EREMOIS_API__LISTEN",
        "timeout = \"3s\"  # from --set",
        "drain_timeout = \"25s\"",
    ] {
        assert!(shown.stdout.lines().any(|l| l == line), "no line {line:?}: {}", shown.stdout);
    }
    // What show prints is a settings file.
    std::fs::write(dir.path().join("shown.toml"), &shown.stdout).unwrap();
    assert_eq!(eremois(dir.path(), &["config", "check", "shown.toml"], &[]).code, 0);
}

#[test]
fn config_check_reports_all_faults_and_exits_1() {
    let dir = empty();
    std::fs::write(dir.path().join("bad.toml"), "[ai]\nmodles = []\ndevice = \"gpu\"\n").unwrap();
    let environment = [("EREMOIS_API__LISTN", "x")];
    for arguments in
        [&["config", "check", "bad.toml"][..], &["config", "check", "--config", "bad.toml"], &["--config", "bad.toml"]]
    {
        let checked = eremois(dir.path(), arguments, &environment);
        assert_eq!((checked.code, checked.stdout.as_str()), (1, ""));
        let lines: Vec<&str> = checked.stderr.lines().collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert_eq!(lines[0], "eremois: bad.toml:2: ai.modles: unknown key; did you mean models?");
        assert!(lines[1].starts_with("eremois: bad.toml:3: ai.device: expected auto, cpu, cuda"), "{lines:?}");
        assert_eq!(lines[2], "eremois: EREMOIS_API__LISTN: unknown variable; did you mean EREMOIS_API__LISTEN?");
    }
    let named = eremois(dir.path(), &["config", "check"], &[("EREMOIS_CONFIG", "bad.toml")]);
    assert_eq!(named.code, 1);
    let sound = eremois(dir.path(), &["config", "check"], &[]);
    assert_eq!((sound.code, sound.stdout.as_str()), (0, "the settings are sound (there is no eremois.toml)\n"));
    let missing = eremois(dir.path(), &["config", "check", "none.toml"], &[]);
    assert_eq!(missing.code, 1);
    assert!(missing.stderr.starts_with("eremois: none.toml: "), "{}", missing.stderr);
}

#[test]
fn serving_nothing_fails_with_one_line() {
    let dir = empty();
    // An existing, empty repository: without the setting the one beside the executable would be found.
    let arguments = ["--set", "ai.models_dir=.", "--set", "api.listen=127.0.0.1:0", "--set", "log.filter=off"];
    let ended = eremois(dir.path(), &arguments, &[]);
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""));
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert!(ended.stderr.starts_with("eremois: no model to serve: "), "{}", ended.stderr);

    let unknown = eremois(dir.path(), &[&arguments[..], &["--set", "ai.models=a,b"]].concat(), &[]);
    assert_eq!(unknown.code, 1);
    let lines: Vec<&str> = unknown.stderr.lines().collect();
    assert!(lines.len() == 2 && lines[0].contains("`a`") && lines[1].contains("`b`"), "{lines:?}");
}

#[test]
fn a_broken_model_fails_the_start_by_name() {
    let dir = empty();
    let model = dir.path().join("broken");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("config.json"), "{\"model_type\": \"bert\"}").unwrap();
    std::fs::write(model.join("model.safetensors"), "no tensors").unwrap();
    let arguments = ["--set", "ai.models=broken", "--set", "ai.models_dir=.", "--set", "api.listen=127.0.0.1:0"];
    let ended = eremois(dir.path(), &[&arguments[..], &["--set", "log.filter=off"]].concat(), &[]);
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""));
    assert!(ended.stderr.contains("broken/model.safetensors") && ended.stderr.lines().count() == 1, "{}", ended.stderr);
}

#[test]
fn a_port_in_use_is_one_clear_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let ended = eremois(empty().path(), &["serve", "--set", &format!("api.listen={address}")], &[]);
    assert_eq!(ended.code, 1);
    let expected = format!("eremois: api.listen: {address}: the address is in use; is another server running?\n");
    assert_eq!(ended.stderr, expected);
}
