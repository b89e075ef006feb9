//! The names and attributes in a mount, from the live store. Knows no FUSE.
//!
//! ```text
//!   /by-id/<digest>/{manifest.json, memory, state, …}
//!   /templates/<name>/<tag>  ->  ../../by-id/<digest>
//! ```
//! Inode numbers are computed from what they stand for, so that a server knows those that its predecessor gave out:
//! one that is not in the map is sought by walking the store again.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::{DashMap, Entry};
use stencilfs::store::{Digest, Serving, Store, TagName, Template, inode_number, path_number};
use stencilfs::units::Bytes;

use crate::server::condemned::Condemned;
use crate::server::node::{Attributes, DirectoryEntry, Kind, Lasting, MANIFEST, Node, ROOT};
use crate::server::open_templates::OpenTemplates;
use crate::server::refusal::Refusal;

/// So many numbers may be entered before those of removed templates are forgotten.
const MOST_ENTERED: usize = 1 << 16;

/// Entries that are listed at a time: more than one answer to the kernel holds.
const MAX_LISTED: usize = 1024;

/// Decides how the next open of a file is served.
pub trait Offer {
    /// How, for file number `file` of `template`.
    fn offer(&self, template: &Template, file: usize) -> Serving;
    /// How long that answer holds.
    fn lasting(&self, template: &Template, file: usize) -> Lasting;
}

/// The tree of one store.
#[derive(Debug)]
pub struct Tree {
    store: Store,
    secret: [u8; 32],
    nodes: DashMap<u64, Node>,
    templates: OpenTemplates,
    condemned: Arc<Condemned>,
    /// Numbers entered since those of removed templates were last sought.
    entered: AtomicUsize,
}

impl Tree {
    /// The tree of that store, of which at most `open` templates are kept open.
    pub fn new(store: Store, open: usize, condemned: Arc<Condemned>) -> Tree {
        let secret = store.secret();
        let templates = OpenTemplates::new(open);
        let (nodes, entered) = (DashMap::new(), AtomicUsize::new(0));
        let tree = Tree { store, secret, nodes, templates, condemned, entered };
        tree.nodes.insert(ROOT, Node::Root);
        tree
    }

    /// What that number stands for.
    ///
    /// # Errors
    /// [`Refusal::Stale`] for a number that nothing in the store has.
    pub fn node(&self, ino: u64) -> Result<Node, Refusal> {
        if let Some(node) = self.nodes.get(&ino) {
            return Ok(node.clone());
        }
        self.walk()?;
        self.nodes.get(&ino).map(|n| n.clone()).ok_or(Refusal::Stale)
    }

    /// Enters every number that the store has now.
    fn walk(&self) -> Result<(), Refusal> {
        self.enter(Node::ById);
        self.enter(Node::Templates);
        for name in self.store.tag_names().map_err(|e| refuse(&e))? {
            for tag in self.store.tags_named(&name).map_err(|e| refuse(&e))? {
                self.enter(Node::Tag(tag));
            }
            self.enter(Node::Name(name));
        }
        for digest in self.store.digests().map_err(|e| refuse(&e))? {
            self.enter(Node::Template(digest));
            self.enter(Node::Manifest(digest));
            // One that cannot be opened has no files; the log says why when somebody asks for it.
            let template = match self.template(&digest) {
                Ok(template) => template,
                Err(Refusal::Away) => return Err(Refusal::Away),
                Err(_) => continue,
            };
            for file in 0..template.files().len() {
                for serving in Serving::ALL {
                    self.enter(Node::File(digest, file, serving));
                }
            }
        }
        Ok(())
    }

    fn enter(&self, node: Node) -> u64 {
        let ino = self.ino(&node);
        if let Entry::Vacant(free) = self.nodes.entry(ino) {
            free.insert(node);
            self.entered.fetch_add(1, Ordering::Relaxed);
        }
        ino
    }

    /// Forgets numbers of templates that the store has no more: what is kept is bounded by the store, not by all that
    /// ever was in it.
    fn bound_nodes(&self) {
        if self.entered.load(Ordering::Relaxed) < MOST_ENTERED {
            return;
        }
        self.entered.store(0, Ordering::Relaxed);
        let Ok(digests) = self.store.digests() else { return };
        let digests: HashSet<Digest> = digests.into_iter().collect();
        self.nodes.retain(|_, node| match node {
            Node::Template(digest) | Node::Manifest(digest) | Node::File(digest, ..) => {
                digests.contains(digest)
            }
            // Found again by name.
            Node::Name(_) | Node::Tag(_) => false,
            Node::Root | Node::ById | Node::Templates => true,
        });
        self.templates.retain(&digests);
    }

    /// The number of a node.
    pub fn ino(&self, node: &Node) -> u64 {
        match node {
            Node::Root => ROOT,
            Node::ById => self.keyed("by-id"),
            Node::Templates => self.keyed("templates"),
            Node::Template(digest) => self.keyed(&format!("by-id/{digest}")),
            Node::Manifest(digest) => inode_number(&self.secret, digest, MANIFEST, Serving::Decode),
            Node::File(digest, file, serving) => {
                // It was open before: somebody had to know that it has such a file.
                let name = self.templates.name(digest, *file).unwrap_or_default();
                inode_number(&self.secret, digest, &name, *serving)
            }
            Node::Name(name) => self.keyed(&format!("templates/{name}")),
            Node::Tag(tag) => self.keyed(&format!("templates/{}/{}", tag.name(), tag.tag())),
        }
    }

    /// 63 bits of a keyed hash of a path, never 0 or 1.
    fn keyed(&self, path: &str) -> u64 {
        path_number(&self.secret, path)
    }

    /// An open template; opened once.
    ///
    /// # Errors
    /// What the store says, logged when it is more than a missing template.
    pub fn template(&self, digest: &Digest) -> Result<Arc<Template>, Refusal> {
        self.templates.get(&self.store, digest).map_err(|e| refuse(&e))
    }

    /// The same for who has it open already: while a removal looks whether anybody does, it may be put back.
    ///
    /// # Errors
    /// As [`template`](Self::template); [`Refusal::Away`] in that time.
    pub fn template_in_use(&self, digest: &Digest) -> Result<Arc<Template>, Refusal> {
        self.template(digest).map_err(|refusal| {
            let undecided = self.condemned.holds(digest) && !self.condemned.is_removed(digest);
            if refusal == Refusal::NoEntry && undecided { Refusal::Away } else { refusal }
        })
    }

    /// Opens a template anew: where its blocks are may have changed since.
    ///
    /// # Errors
    /// As [`template`](Self::template).
    pub fn reopen(&self, digest: &Digest) -> Result<Arc<Template>, Refusal> {
        self.templates.reopen(&self.store, digest).map_err(|e| refuse(&e))
    }

    /// What a name in a directory stands for, and how long that holds.
    ///
    /// # Errors
    /// [`Refusal::NoEntry`], [`Refusal::NotDirectory`], or the store's trouble.
    pub fn lookup(
        &self,
        parent: u64,
        name: &OsStr,
        offer: &impl Offer,
    ) -> Result<(Attributes, Lasting), Refusal> {
        let parent = self.node(parent)?;
        let name = name.to_str().ok_or(Refusal::NoEntry)?;
        let node = self.child(&parent, name, offer)?;
        let lasting = match &node {
            Node::Root | Node::ById | Node::Template(_) => Lasting::Long,
            Node::Templates | Node::Name(_) | Node::Tag(_) | Node::Manifest(_) => Lasting::Not,
            Node::File(digest, file, _) => offer.lasting(&*self.template(digest)?, *file),
        };
        self.bound_nodes();
        self.enter(node.clone());
        Ok((self.attributes_of(&node)?, lasting))
    }

    fn child(&self, parent: &Node, name: &str, offer: &impl Offer) -> Result<Node, Refusal> {
        match (name, parent) {
            // Asked for by who opens a file by its number.
            (".", Node::Template(digest) | Node::Manifest(digest) | Node::File(digest, ..))
                if self.gone(digest)? =>
            {
                return Err(Refusal::NoEntry);
            }
            (".", _) => return Ok(parent.clone()),
            ("..", _) => return Ok(parent.parent()),
            _ => {}
        }
        match parent {
            Node::Root => match name {
                "by-id" => Ok(Node::ById),
                "templates" => Ok(Node::Templates),
                _ => Err(Refusal::NoEntry),
            },
            Node::ById => match name.parse::<Digest>() {
                // One spelling: capitals would be a second name of the same directory.
                Ok(digest) if digest.to_string() == name && !self.gone(&digest)? => {
                    Ok(Node::Template(digest))
                }
                _ => Err(Refusal::NoEntry),
            },
            Node::Template(digest) if self.gone(digest)? => Err(Refusal::NoEntry),
            Node::Template(digest) if name == MANIFEST => Ok(Node::Manifest(*digest)),
            Node::Template(digest) => {
                let template = self.template(digest)?;
                let file = template.file(name).ok_or(Refusal::NoEntry)?;
                Ok(Node::File(*digest, file, offer.offer(&template, file)))
            }
            Node::Templates => {
                if self.store.has_name(name).map_err(|e| refuse(&e))? {
                    Ok(Node::Name(name.to_owned()))
                } else {
                    Err(Refusal::NoEntry)
                }
            }
            Node::Name(family) => {
                let tag = TagName::new(family, name).map_err(|_| Refusal::NoEntry)?;
                match self.store.tag(&tag).map_err(|e| refuse(&e))? {
                    Some(_) => Ok(Node::Tag(tag)),
                    None => Err(Refusal::NoEntry),
                }
            }
            Node::Manifest(_) | Node::File(..) | Node::Tag(_) => Err(Refusal::NotDirectory),
        }
    }

    /// Closes every template that is open: what somebody still needs is opened again.
    pub fn close_templates(&self) {
        self.templates.close();
    }

    /// True for a template that nobody may find or open: the store has it no more, or it is condemned. Its open files go
    /// on.
    ///
    /// # Errors
    /// [`Refusal::Away`] when the store cannot be asked.
    pub fn gone(&self, digest: &Digest) -> Result<bool, Refusal> {
        if self.condemned.holds(digest) { Ok(true) } else { self.removed(digest) }
    }

    /// True for one that the store has no more.
    ///
    /// # Errors
    /// As [`gone`](Self::gone).
    pub fn removed(&self, digest: &Digest) -> Result<bool, Refusal> {
        self.store.find(digest).map(|found| !found).map_err(|e| refuse(&e))
    }

    /// What stat(2) shows for that number.
    ///
    /// # Errors
    /// [`Refusal::Stale`] for one that means nothing any more, or the store's trouble.
    pub fn attributes(&self, ino: u64) -> Result<Attributes, Refusal> {
        let node = self.node(ino)?;
        self.attributes_of(&node).map_err(|r| if r == Refusal::NoEntry { Refusal::Stale } else { r })
    }

    fn attributes_of(&self, node: &Node) -> Result<Attributes, Refusal> {
        let plain = |kind, mode, size: u64| Attributes {
            ino: self.ino(node),
            kind,
            mode,
            uid: 0,
            gid: 0,
            size: Bytes::new(size),
            data: Bytes::ZERO,
            created: 0,
        };
        Ok(match node {
            Node::Root | Node::ById | Node::Templates | Node::Name(_) => plain(Kind::Directory, 0o555, 0),
            Node::Template(digest) => match self.store.template(digest) {
                // Who may not read the files learns nothing of them, not even by a descriptor of their names.
                Ok(template) => {
                    let (policy, all) = (template.policy(), plain(Kind::Directory, 0o555, 0));
                    let read = policy.mode & 0o444;
                    Attributes { mode: read | read >> 2, uid: policy.uid, gid: policy.gid, ..all }
                }
                Err(_) => plain(Kind::Directory, 0o500, 0),
            },
            Node::Tag(_) => plain(Kind::Symlink, 0o777, self.target(node)?.len() as u64),
            Node::Manifest(digest) | Node::File(digest, ..) => {
                // Opened anew where it can be: mode and owner may have changed since.
                let fresh = self.store.template(digest).map(Arc::new);
                let template = fresh.or_else(|_| self.template(digest))?;
                let (size, data) = match node {
                    Node::File(_, file, _) => {
                        let file = template.files().get(*file).ok_or(Refusal::NoEntry)?;
                        (file.size, file.data_bytes)
                    }
                    _ => {
                        let length = Bytes::new(template.manifest_json().len() as u64);
                        (length, length)
                    }
                };
                let policy = template.policy();
                Attributes {
                    mode: policy.mode & 0o555,
                    uid: policy.uid,
                    gid: policy.gid,
                    size,
                    data,
                    created: policy.created,
                    ..plain(Kind::File, 0, 0)
                }
            }
        })
    }

    /// Where a tag leads.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] for what is no tag, [`Refusal::NoEntry`] for one that is gone.
    pub fn read_link(&self, ino: u64) -> Result<String, Refusal> {
        self.target(&self.node(ino)?)
    }

    fn target(&self, node: &Node) -> Result<String, Refusal> {
        let Node::Tag(tag) = node else { return Err(Refusal::Invalid) };
        match self.store.tag(tag).map_err(|e| refuse(&e))? {
            Some(digest) => Ok(format!("../../by-id/{digest}")),
            None => Err(Refusal::NoEntry),
        }
    }

    /// The next entries of a directory, at most [`MAX_LISTED`], whose cookies are above `after`, by cookie.
    ///
    /// # Errors
    /// [`Refusal::NotDirectory`], or the store's trouble.
    pub fn list(&self, ino: u64, after: u64, offer: &impl Offer) -> Result<Vec<DirectoryEntry>, Refusal> {
        let node = self.node(ino)?;
        let mut children: Vec<(String, Node)> = match &node {
            Node::Root => vec![("by-id".into(), Node::ById), ("templates".into(), Node::Templates)],
            Node::ById => {
                let all = self.store.digests().map_err(|e| refuse(&e))?;
                all.into_iter().map(|d| (d.to_string(), Node::Template(d))).collect()
            }
            Node::Template(digest) if self.gone(digest)? => Vec::new(),
            Node::Template(digest) => {
                let template = self.template(digest)?;
                let files =
                    template.files().iter().enumerate().map(|(i, file)| {
                        (file.name.clone(), Node::File(*digest, i, offer.offer(&template, i)))
                    });
                files.chain([(MANIFEST.to_owned(), Node::Manifest(*digest))]).collect()
            }
            Node::Templates => {
                let names = self.store.tag_names().map_err(|e| refuse(&e))?;
                names.into_iter().map(|n| (n.clone(), Node::Name(n))).collect()
            }
            Node::Name(name) => {
                let tags = self.store.tags_named(name).map_err(|e| refuse(&e))?;
                tags.into_iter().map(|tag| (tag.tag().to_owned(), Node::Tag(tag))).collect()
            }
            Node::Manifest(_) | Node::File(..) | Node::Tag(_) => return Err(Refusal::NotDirectory),
        };
        children.push((".".into(), node.clone()));
        children.push(("..".into(), node.parent()));
        let mut children: Vec<(u64, String, Node)> = children
            .into_iter()
            .map(|(name, child)| (self.cookie(&name), name, child))
            .filter(|(cookie, ..)| *cookie > after)
            .collect();
        if children.len() > MAX_LISTED {
            children.select_nth_unstable_by_key(MAX_LISTED, |(cookie, ..)| *cookie);
            children.truncate(MAX_LISTED);
        }
        children.sort_unstable_by_key(|(cookie, ..)| *cookie);
        let entry = |(cookie, name, child): (u64, String, Node)| DirectoryEntry {
            cookie,
            ino: self.ino(&child),
            kind: child.kind(),
            name,
        };
        Ok(children.into_iter().map(entry).collect())
    }

    fn cookie(&self, name: &str) -> u64 {
        match name {
            "." => 1,
            ".." => 2,
            name => self.keyed(name).max(3),
        }
    }

    /// Templates and the bytes of data in them, for statfs(2).
    ///
    /// # Errors
    /// The store's trouble.
    pub fn totals(&self) -> Result<(u64, Bytes), Refusal> {
        let digests = self.store.digests().map_err(|e| refuse(&e))?;
        let data = digests
            .iter()
            .filter_map(|d| self.template(d).ok())
            .map(|t| t.files().iter().map(|f| f.data_bytes).sum())
            .sum();
        Ok((digests.len() as u64, data))
    }
}

/// The refusal for an error of the store; what is more than a missing thing is logged here, once a request. That the store
/// is away is logged once, by who waits for it.
fn refuse(error: &stencilfs::error::Error) -> Refusal {
    let refusal = Refusal::from(error);
    if !matches!(refusal, Refusal::NoEntry | Refusal::Away) {
        log::error!("{error}");
    }
    refusal
}
