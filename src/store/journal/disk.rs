//! The journal's folder, as little of a file system as it needs. A trait, so that tests can lose power, fill the disk and
//! let a sync fail at the moment of their choice.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Result};

/// A folder of files. Blocks: every method.
pub trait Disk: Send + Sync + 'static {
    /// The names of all files.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Opens a file that is there, for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Makes a file. Errors: one of that name is there.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    fn remove(&self, name: &str) -> io::Result<()>;

    /// Gives a file another name, in the place of what has it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Makes names durable: those made, changed and removed before.
    fn sync_names(&self) -> io::Result<()>;
}

/// An open file. It can be read for as long as it is held, removed or not. Blocks: every method.
pub trait DiskFile: Send + Sync {
    fn len(&self) -> io::Result<u64>;

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Errors: fewer bytes are there, among others.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes all of them, at an offset, because after a write that failed nobody knows where the file ends.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    fn truncate(&self, len: u64) -> io::Result<()>;

    /// Makes what was written durable, and the length needed to read it.
    fn sync(&self) -> io::Result<()>;
}

/// A folder of the operating system, locked to this process.
pub struct Folder {
    path: PathBuf,
    /// Held for its lock, which ends with the process, however that ends.
    _lock: File,
}

/// Not a segment, nor anything else that is read: it is there to be locked.
const LOCK: &str = "lock";

impl Folder {
    /// Opens the folder, made if it is missing. Errors: [`Error::Config`] where it cannot be made or written, or where
    /// another process holds it: two writers of one journal would lose each other's entries.
    pub fn open(path: &Path) -> Result<Self> {
        let fault = |what: &str| Error::Config { faults: vec![format!("database.path: {}: {what}", path.display())] };
        fs::create_dir_all(path).map_err(|e| fault(&e.to_string()))?;
        // The folder's own name must survive as well as what is in it.
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(|e| fault(&e.to_string()))?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path.join(LOCK));
        let lock = lock.map_err(|e| fault(&e.to_string()))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_path_buf(), _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                Err(fault("another process has this journal open; each needs its own path"))
            }
            Err(TryLockError::Error(e)) => Err(fault(&format!("cannot be locked: {e}"))),
        }
    }
}

impl Disk for Folder {
    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(true).open(self.path.join(name))?))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(true).create_new(true).open(self.path.join(name))?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

/// A folder that is only read, whoever works on it. What would change it is refused.
pub struct ReadOnly {
    path: PathBuf,
}

impl ReadOnly {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }
}

impl Disk for ReadOnly {
    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    /// For reading alone: the system refuses writes to it.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(File::open(self.path.join(name))?))
    }

    fn create(&self, _name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn remove(&self, _name: &str) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn rename(&self, _from: &str, _to: &str) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_names(&self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        // fdatasync: the times a file was touched at need not survive.
        self.sync_data()
    }
}

/// Writes a small file whole or not at all, durably: beside its place, then into it.
pub fn replace(disk: &dyn Disk, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = format!("{name}.new");
    match disk.remove(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        // Left by a crash, or not there.
        _ => {}
    }
    let file = disk.create(&new)?;
    file.write_at(0, bytes)?;
    file.sync()?;
    disk.rename(&new, name)?;
    disk.sync_names()
}

/// All of a file. Errors: among others, that it is not there.
pub fn read_whole(disk: &dyn Disk, name: &str) -> io::Result<(Arc<dyn DiskFile>, Vec<u8>)> {
    let file = disk.open(name)?;
    let len = usize::try_from(file.len()?).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut bytes = vec![0; len];
    file.read_at(0, &mut bytes)?;
    Ok((file, bytes))
}
