//! A folder in memory that fails and loses power on command, in the ways POSIX allows.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use eremois::store::journal::disk::{Disk, DiskFile};
use parking_lot::{Mutex, MutexGuard};
use rand::Rng;
use rand::rngs::StdRng;

/// What disks write whole.
const SECTOR: usize = 512;

/// One folder, shared by all its handles.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Inner>);

#[derive(Default)]
struct Inner {
    names: Mutex<Names>,
    num_ops: AtomicU64,
    faults: Mutex<Faults>,
    /// Held while syncs of files shall not return.
    syncs: Mutex<()>,
}

#[derive(Default)]
struct Names {
    now: BTreeMap<String, Arc<Inode>>,
    /// As of the last sync, and each change since.
    durable: BTreeMap<String, Arc<Inode>>,
    changes: Vec<NameChange>,
}

enum NameChange {
    Add(String, Arc<Inode>),
    Remove(String),
    Rename(String, String),
}

#[derive(Default)]
struct Inode(Mutex<Contents>);

#[derive(Default)]
struct Contents {
    now: Vec<u8>,
    durable: Vec<u8>,
    changes: Vec<Write>,
}

enum Write {
    At(usize, Vec<u8>),
    Truncate(usize),
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// After so many operations that change something nothing works any more: the power is gone.
    pub power_fails_at: Option<u64>,
    /// Every write fails so.
    pub write: Option<io::ErrorKind>,
    /// Every sync of a file fails so, and what it should have written never is, whatever later syncs say.
    pub sync: Option<io::ErrorKind>,
    /// Making files fails so.
    pub create: Option<io::ErrorKind>,
    /// Removing files fails so.
    pub remove: Option<io::ErrorKind>,
}

impl SimDisk {
    pub fn set(&self, faults: Faults) {
        *self.0.faults.lock() = faults;
    }

    /// Keeps syncs of files from returning as long as the guard lives.
    pub fn hold_syncs(&self) -> MutexGuard<'_, ()> {
        self.0.syncs.lock()
    }

    pub fn num_ops(&self) -> u64 {
        self.0.num_ops.load(Ordering::SeqCst)
    }

    pub fn names(&self) -> Vec<String> {
        self.0.names.lock().now.keys().cloned().collect()
    }

    /// The folder after a loss of power: of what was not synced any part may be there, in any order, sector by sector.
    pub fn after_power_loss(&self, rng: &mut StdRng) -> SimDisk {
        let names = self.0.names.lock();
        let mut kept = names.durable.clone();
        for change in &names.changes {
            if rng.random_bool(0.5) {
                continue;
            }
            match change {
                NameChange::Add(name, inode) => drop(kept.insert(name.clone(), inode.clone())),
                NameChange::Remove(name) => drop(kept.remove(name)),
                NameChange::Rename(from, to) => {
                    if let Some(inode) = kept.remove(from) {
                        kept.insert(to.clone(), inode);
                    }
                }
            }
        }
        let disk = SimDisk::default();
        {
            let mut new = disk.0.names.lock();
            for (name, inode) in kept {
                let bytes = inode.0.lock().after_power_loss(rng);
                let inode =
                    Arc::new(Inode(Mutex::new(Contents { now: bytes.clone(), durable: bytes, changes: vec![] })));
                new.now.insert(name.clone(), inode.clone());
                new.durable.insert(name, inode);
            }
        }
        disk
    }

    fn op(&self, fault: Option<io::ErrorKind>) -> io::Result<Faults> {
        let faults = *self.0.faults.lock();
        let op = self.0.num_ops.fetch_add(1, Ordering::SeqCst);
        if faults.power_fails_at.is_some_and(|at| op >= at) {
            return Err(io::Error::other("the power is gone"));
        }
        fault.map_or(Ok(faults), |kind| Err(kind.into()))
    }

    fn faults(&self) -> Faults {
        *self.0.faults.lock()
    }
}

impl Contents {
    fn after_power_loss(&self, rng: &mut StdRng) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for change in &self.changes {
            match change {
                Write::At(offset, new) => {
                    for (i, sector) in new.chunks(SECTOR).enumerate() {
                        if rng.random_bool(0.5) {
                            apply(&mut bytes, *offset + i * SECTOR, sector);
                        }
                    }
                }
                Write::Truncate(len) => {
                    if rng.random_bool(0.5) {
                        bytes.truncate(*len);
                    }
                }
            }
        }
        bytes
    }
}

fn apply(bytes: &mut Vec<u8>, offset: usize, new: &[u8]) {
    let len = bytes.len().max(offset + new.len());
    bytes.resize(len, 0);
    bytes[offset..offset + new.len()].copy_from_slice(new);
}

impl Disk for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let inode = self.0.names.lock().now.get(name).cloned();
        Ok(Arc::new(SimFile { disk: self.clone(), inode: inode.ok_or(io::ErrorKind::NotFound)? }))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.op(self.faults().create)?;
        let mut names = self.0.names.lock();
        if names.now.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = Arc::new(Inode::default());
        names.now.insert(name.to_string(), inode.clone());
        names.changes.push(NameChange::Add(name.to_string(), inode.clone()));
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.op(self.faults().remove)?;
        let mut names = self.0.names.lock();
        names.now.remove(name).ok_or(io::ErrorKind::NotFound)?;
        names.changes.push(NameChange::Remove(name.to_string()));
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.op(None)?;
        let mut names = self.0.names.lock();
        let inode = names.now.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.now.insert(to.to_string(), inode);
        names.changes.push(NameChange::Rename(from.to_string(), to.to_string()));
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        self.op(None)?;
        let mut names = self.0.names.lock();
        names.durable = names.now.clone();
        names.changes.clear();
        Ok(())
    }
}

struct SimFile {
    disk: SimDisk,
    inode: Arc<Inode>,
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inode.0.lock().now.len() as u64)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let contents = self.inode.0.lock();
        let from = contents.now.get(offset as usize..).and_then(|rest| rest.get(..bytes.len()));
        bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let fault = self.disk.faults().write;
        let written = if fault.is_some() { &bytes[..bytes.len() / 2] } else { bytes };
        let done = self.disk.op(fault);
        // A write that fails for want of space has written some.
        if done.is_ok() || fault.is_some() {
            let mut contents = self.inode.0.lock();
            apply(&mut contents.now, offset as usize, written);
            contents.changes.push(Write::At(offset as usize, written.to_vec()));
        }
        done.map(drop)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.disk.op(None)?;
        let mut contents = self.inode.0.lock();
        contents.now.truncate(len as usize);
        contents.changes.push(Write::Truncate(len as usize));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        drop(self.disk.0.syncs.lock());
        let fault = self.disk.faults().sync;
        let done = self.disk.op(fault);
        let mut contents = self.inode.0.lock();
        if done.is_ok() {
            let Contents { durable, changes, .. } = &mut *contents;
            for change in changes.drain(..) {
                match change {
                    Write::At(offset, new) => apply(durable, offset, &new),
                    Write::Truncate(len) => durable.truncate(len),
                }
            }
        } else if fault.is_some() {
            // As Linux does since 4.13 and others before: the pages count as written, and are not.
            contents.changes.clear();
        }
        done.map(drop)
    }
}
